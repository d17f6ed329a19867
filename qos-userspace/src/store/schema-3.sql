-- Place among the class numbers at egress, of allocations that need one. It was the slot's, and a gateway
-- that runs keeps its classes.
ALTER TABLE allocations ADD COLUMN class INTEGER;
ALTER TABLE history ADD COLUMN class INTEGER;
UPDATE allocations SET class = slot
 WHERE enforcement = 'shape' OR guaranteed_up IS NOT NULL OR guaranteed_down IS NOT NULL;
CREATE UNIQUE INDEX allocations_by_class ON allocations (class);
INSERT INTO freed_slots (kind, slot)
SELECT 'class', slot FROM freed_slots WHERE kind = 'allocation' ORDER BY sequence;
