-- The largest packet of a level, in bytes.
ALTER TABLE profiles ADD COLUMN mtu INTEGER;
ALTER TABLE allocations ADD COLUMN mtu INTEGER;
ALTER TABLE history ADD COLUMN mtu INTEGER;
