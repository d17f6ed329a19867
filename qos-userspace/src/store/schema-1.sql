-- Rates are bit/s, sizes bytes, times RFC 3339 in UTC; null means open or none.

CREATE TABLE providers (
    name           TEXT PRIMARY KEY,
    kind           TEXT NOT NULL CHECK (kind IN ('application', 'network')),
    networks       TEXT NOT NULL, -- JSON list of prefixes
    aggregate_up   INTEGER,
    aggregate_down INTEGER,
    slot           INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;

CREATE TABLE applications (
    provider TEXT NOT NULL REFERENCES providers (name),
    name     TEXT NOT NULL,
    slot     INTEGER NOT NULL UNIQUE,
    PRIMARY KEY (provider, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    name       TEXT PRIMARY KEY,
    addresses  TEXT NOT NULL, -- JSON list of prefixes
    rate_up    INTEGER NOT NULL,
    rate_down  INTEGER NOT NULL,
    link_layer TEXT NOT NULL,
    overhead   INTEGER NOT NULL,
    delay_us   INTEGER NOT NULL,
    loss_ppm   INTEGER NOT NULL,
    slot       INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;

CREATE TABLE profiles (
    name            TEXT PRIMARY KEY,
    guaranteed_up   INTEGER,
    guaranteed_down INTEGER,
    maximum_up      INTEGER,
    maximum_down    INTEGER,
    burst_up        INTEGER,
    burst_down      INTEGER,
    priority        INTEGER NOT NULL,
    delay_us        INTEGER,
    loss            REAL,
    dscp            INTEGER,
    enforcement     TEXT NOT NULL,
    hard            INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE allocations (
    id                  INTEGER PRIMARY KEY,
    provider            TEXT NOT NULL REFERENCES providers (name),
    application         TEXT,
    profile             TEXT, -- what it was taken from; the profile may have gone since
    session             TEXT REFERENCES sessions (name),
    selectors           TEXT NOT NULL, -- JSON list of selectors as text
    precedence          INTEGER NOT NULL,
    guaranteed_up       INTEGER,
    guaranteed_down     INTEGER,
    maximum_up          INTEGER,
    maximum_down        INTEGER,
    burst_up            INTEGER,
    burst_down          INTEGER,
    priority            INTEGER NOT NULL,
    delay_us            INTEGER,
    loss                REAL,
    dscp                INTEGER,
    enforcement         TEXT NOT NULL,
    hard                INTEGER NOT NULL,
    delay_bound_up_us   INTEGER,
    delay_bound_down_us INTEGER,
    granted_at          TEXT NOT NULL,
    expires_at          TEXT,
    slot                INTEGER NOT NULL UNIQUE,
    FOREIGN KEY (provider, application) REFERENCES applications (provider, name)
) STRICT;

CREATE INDEX allocations_by_provider ON allocations (provider, application);
CREATE INDEX allocations_by_session ON allocations (session);

-- Allocations that ended, in that order. What they name may have gone since.
CREATE TABLE history (
    sequence            INTEGER PRIMARY KEY AUTOINCREMENT,
    id                  INTEGER NOT NULL UNIQUE,
    provider            TEXT NOT NULL,
    application         TEXT,
    profile             TEXT,
    session             TEXT,
    selectors           TEXT NOT NULL,
    precedence          INTEGER NOT NULL,
    guaranteed_up       INTEGER,
    guaranteed_down     INTEGER,
    maximum_up          INTEGER,
    maximum_down        INTEGER,
    burst_up            INTEGER,
    burst_down          INTEGER,
    priority            INTEGER NOT NULL,
    delay_us            INTEGER,
    loss                REAL,
    dscp                INTEGER,
    enforcement         TEXT NOT NULL,
    hard                INTEGER NOT NULL,
    delay_bound_up_us   INTEGER,
    delay_bound_down_us INTEGER,
    granted_at          TEXT NOT NULL,
    expires_at          TEXT,
    slot                INTEGER NOT NULL,
    ended_at            TEXT,
    reason              TEXT
) STRICT;

-- Slots that were used and are free, in the order in which they were freed.
CREATE TABLE freed_slots (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    kind     TEXT NOT NULL,
    slot     INTEGER NOT NULL,
    UNIQUE (kind, slot)
) STRICT;

CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE VIEW allocation_status AS
    SELECT id, provider, application, session, 'available' AS status, NULL AS reason,
           granted_at, expires_at, NULL AS ended_at
      FROM allocations
    UNION ALL
    SELECT id, provider, application, session, 'unavailable', reason, granted_at, expires_at, ended_at
      FROM history;
