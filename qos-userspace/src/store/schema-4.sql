-- Contracts: what a provider, or one of its applications, may have.
ALTER TABLE providers RENAME COLUMN aggregate_up TO maximum_up;
ALTER TABLE providers RENAME COLUMN aggregate_down TO maximum_down;
ALTER TABLE providers ADD COLUMN guaranteed_up INTEGER;
ALTER TABLE providers ADD COLUMN guaranteed_down INTEGER;
ALTER TABLE providers ADD COLUMN best_priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE providers ADD COLUMN profiles TEXT; -- JSON list of names; none: all
ALTER TABLE providers ADD COLUMN allocations INTEGER;
-- What lines share before the link.
CREATE TABLE segments (
    name          TEXT PRIMARY KEY,
    capacity_up   INTEGER NOT NULL,
    capacity_down INTEGER NOT NULL,
    rest_up       INTEGER,
    rest_down     INTEGER
) STRICT, WITHOUT ROWID;
ALTER TABLE sessions ADD COLUMN segments TEXT NOT NULL DEFAULT '[]'; -- JSON list of names
-- Where a session ends, what reports it, when that last did, and since when it is down.
ALTER TABLE sessions ADD COLUMN bras TEXT;
ALTER TABLE sessions ADD COLUMN source TEXT;
ALTER TABLE sessions ADD COLUMN seen_at TEXT;
ALTER TABLE sessions ADD COLUMN down_since TEXT;
-- Whether a profile may be asked for, and for how long: ISO 8601 durations.
ALTER TABLE profiles ADD COLUMN status TEXT NOT NULL DEFAULT 'active'
    CHECK (status IN ('active', 'inactive', 'deprecated'));
ALTER TABLE profiles ADD COLUMN shortest TEXT;
ALTER TABLE profiles ADD COLUMN longest TEXT;
ALTER TABLE applications ADD COLUMN maximum_up INTEGER;
ALTER TABLE applications ADD COLUMN maximum_down INTEGER;
ALTER TABLE applications ADD COLUMN guaranteed_up INTEGER;
ALTER TABLE applications ADD COLUMN guaranteed_down INTEGER;
ALTER TABLE applications ADD COLUMN best_priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE applications ADD COLUMN profiles TEXT;
ALTER TABLE applications ADD COLUMN allocations INTEGER;
-- How much delays may differ, and what the bound of the delay is made of.
ALTER TABLE profiles ADD COLUMN jitter_us INTEGER;
ALTER TABLE allocations ADD COLUMN jitter_us INTEGER;
ALTER TABLE allocations ADD COLUMN delay_line_us INTEGER;
ALTER TABLE allocations ADD COLUMN delay_line_queue_us INTEGER;
ALTER TABLE allocations ADD COLUMN delay_link_queue_us INTEGER;
ALTER TABLE history ADD COLUMN jitter_us INTEGER;
ALTER TABLE history ADD COLUMN delay_line_us INTEGER;
ALTER TABLE history ADD COLUMN delay_line_queue_us INTEGER;
ALTER TABLE history ADD COLUMN delay_link_queue_us INTEGER;
-- Every decision, and what followed from it for something else; times RFC 3339.
CREATE TABLE decisions (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    at          TEXT NOT NULL,
    actor       TEXT NOT NULL,
    action      TEXT NOT NULL,
    verdict     TEXT NOT NULL CHECK (verdict IN ('done', 'refused', 'failed')),
    provider    TEXT,
    application TEXT,
    session     TEXT,
    allocation  INTEGER,
    code        TEXT,
    reason      TEXT,
    asked       TEXT -- JSON object
) STRICT;
CREATE INDEX decisions_by_provider ON decisions (provider) WHERE provider IS NOT NULL;
CREATE INDEX decisions_by_session ON decisions (session) WHERE session IS NOT NULL;
CREATE INDEX decisions_by_allocation ON decisions (allocation) WHERE allocation IS NOT NULL;
-- A line that came into service with a grant.
ALTER TABLE sessions ADD COLUMN on_demand INTEGER NOT NULL DEFAULT 0;
-- Every line that a source tells of; times RFC 3339.
CREATE TABLE subscribers (
    id         INTEGER PRIMARY KEY,
    line       TEXT NOT NULL UNIQUE,
    source     TEXT,
    key        TEXT,
    addresses  TEXT NOT NULL, -- JSON list of prefixes
    rate_up    INTEGER,
    rate_down  INTEGER,
    link_layer TEXT NOT NULL,
    overhead   INTEGER,
    delay_us   INTEGER NOT NULL,
    loss_ppm   INTEGER NOT NULL,
    segments   TEXT NOT NULL, -- JSON list of names
    bras       TEXT,
    started_at TEXT NOT NULL,
    seen_at    TEXT NOT NULL,
    down_since TEXT,
    reason     TEXT,
    sequence   INTEGER NOT NULL -- the last change's
) STRICT;
CREATE INDEX subscribers_by_change ON subscribers (sequence);
CREATE INDEX subscribers_by_bras ON subscribers (bras) WHERE bras IS NOT NULL AND down_since IS NULL;
CREATE INDEX subscribers_down ON subscribers (sequence) WHERE down_since IS NOT NULL;
-- Their prefixes: the family's number and the address, first and last. No two overlap.
CREATE TABLE subscriber_addresses (
    first      BLOB PRIMARY KEY,
    last       BLOB NOT NULL,
    subscriber INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX subscriber_addresses_by_line ON subscriber_addresses (subscriber);
-- API keys. A key's secret is known to who holds it only.
CREATE TABLE keys (
    id          TEXT PRIMARY KEY, -- 12 hexadecimal digits
    provider    TEXT NOT NULL REFERENCES providers (name),
    application TEXT,
    hash        TEXT NOT NULL, -- SHA-256 of the secret, hexadecimal
    read_only   INTEGER NOT NULL,
    created_at  TEXT NOT NULL,
    expires_at  TEXT,
    FOREIGN KEY (provider, application) REFERENCES applications (provider, name)
) STRICT, WITHOUT ROWID;
