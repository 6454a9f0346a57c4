"""Every store key of Nexus, with its type and meaning. All that moves together shares the hash tag {p}: one partition.

head            string  the log's end and its counters, packed (accept.lua)
log:<n>         string  a segment of the log: frames, appended
answered:<id>   string  the last answer of accept.lua to one sender, with the number of its request; for a minute
segments        hash    n -> packed (first arrival, last arrival, bytes, ordinal behind the last event) of each
                        sealed segment
ids             hash    the id table: digest of the event id -> place of the event
id:<b>          hash    a bucket of the id table of earlier versions; moved into `ids` at the first use of the log
owner           hash    the lease: epoch, holder, expires
checkpoint:<s>  hash    a stream's position and account: segment, offset, index, ordinal, processed, dead, at
published       string  how far the public keys are up to date: a log position, JSON
journal:<s>     list    a stream's latest commits, newest first: packed (ordinal, at)
dead:<s>        hash    a stream's dead letters: id -> JSON
deadorder:<s>   zset    their ids by the time of death
user:<id>       hash    feature tiles of a user: "p" position, "f" events ahead of the clock, 8 bytes each -> state
merchant:<id>   hash    the same of a payee
zone:<cell>     hash    the same of an H3 cell
paid:<day>      hash    payments that arrived on a day: transaction -> packed (merchant, ordinal, ordinal of the first
                        report of fraud), so that a late report finds its payee, and counts once
definitions     string  the feature definitions that are served and the families they are read from, JSON
backfill        string  how far the families of new definitions have been filled from the stored events, JSON
due             zset    users whose public features change by themselves, by when (epoch ms)
rows:<n>        string  the storage index of segment n: fixed rows of place, event time, and hashes
redriven        hash    id of a dead letter sent again -> the place it was sent to; "<" and the id that it would have if it
                        died there again -> its id, attempts, first_at and received_at before that, JSON
spans           hash    n -> packed (least event time, greatest event time, rows) of the storage index
agg:<step>:<t>  hash    event counters of the bucket that begins at t: "<dimension>:<value>" -> count
values:<d>      set     values of a dimension that have counters of their own, so that their number stays bounded
seen:<t>        string  HyperLogLog of the users of the hour that begins at t
scores:<day>    hash    fraud scores of the payments that arrived on a day: transaction -> packed
labels:<day>    hash    late labels that arrived on a day: transaction -> 0 or 1
habit:<id>      string  a payer's habit, packed
payee:<id>      string  a payee's record, packed
demand:<z>:<w>  hash    ride requests of a zone (or "city") in the week that begins at w: step start -> count
model:<name>    string  a model's state, packed
versions:<name> list    a model's versions and how they were judged, JSON, newest first
circuit         hash    the bridge's circuit breaker, shared by instances: state (JSON), what was decided by hand
attempts        list    the bridge's latest attempts, JSON, newest first
capabilities    string  what the partner at which address was found to support, JSON
health          list    the latest verdicts on the partner's health, JSON, newest first
outage          string  the outage that has not been caught up with yet, JSON
outage:users    string  HyperLogLog of the users whose events waited in it
outages         list    the outages before it, JSON, newest first
settings        hash    run-time settings that override the environment
audit           list    changes of settings, JSON, newest first
"""

PREFIX = "ml:{p}:"
STREAMS = ("features", "storage", "aggregates", "inference", "bridge")  # the order of their bits in a frame's mask
LOCAL_STREAMS = STREAMS[:4]

HEAD = PREFIX + "head"
LOG = PREFIX + "log:"
ANSWERED = PREFIX + "answered:"
SEGMENTS = PREFIX + "segments"
IDS = PREFIX + "ids"
ID_BUCKET = PREFIX + "id:"
OWNER = PREFIX + "owner"
CHECKPOINT = PREFIX + "checkpoint:"
PUBLISHED = PREFIX + "published"
JOURNAL = PREFIX + "journal:"
DEAD = PREFIX + "dead:"
REDRIVEN = PREFIX + "redriven"
DEAD_ORDER = PREFIX + "deadorder:"
USER = PREFIX + "user:"
MERCHANT = PREFIX + "merchant:"
ZONE = PREFIX + "zone:"
PAID = PREFIX + "paid:"
DEFINITIONS = PREFIX + "definitions"
BACKFILL = PREFIX + "backfill"
DUE = PREFIX + "due"
ROWS = PREFIX + "rows:"
SPANS = PREFIX + "spans"
AGGREGATE = PREFIX + "agg:"
VALUES = PREFIX + "values:"
SEEN = PREFIX + "seen:"
SCORES = PREFIX + "scores:"
LABELS = PREFIX + "labels:"
HABIT = PREFIX + "habit:"
PAYEE = PREFIX + "payee:"
DEMAND = PREFIX + "demand:"
MODEL = PREFIX + "model:"
VERSIONS = PREFIX + "versions:"
CIRCUIT = PREFIX + "circuit"
ATTEMPTS = PREFIX + "attempts"
CAPABILITIES = PREFIX + "capabilities"
HEALTH = PREFIX + "health"
OUTAGE = PREFIX + "outage"
OUTAGE_USERS = PREFIX + "outage:users"
OUTAGES = PREFIX + "outages"
SETTINGS = PREFIX + "settings"
AUDIT = PREFIX + "audit"

SERVING = "ml:serving:features:"  # + user id: JSON {"user_id","features","computed_at"}, published by Nexus alone
PARTNER = "features:"  # + user id: the Python service's features of the user, JSON or a hash; Nexus only reads it
