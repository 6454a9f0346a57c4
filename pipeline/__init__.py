"""Nexus's pipeline: the data's way.

HTTP -> ingest -> log -> five streams -> feature store, models -> serving -> HTTP, dashboard

    ingest        judges each event of a posted body and brings the good ones to the log, in one atomic step
    log           frames of events in segments (frames); the truth, and the write-ahead log of everything else
    streams/      features, storage, aggregates, inference: features first, each with its checkpoints (runner, group, worker, straggler);
                  bridge: on its own, to the Python service (gate, sender, suspects; partner, transport, replies, circuit,
                  throttle, attempts, outages)
    checkpoints   effects and position in one step, fenced by the lease
    precedence    what somebody waits for goes first
    turns         so many requests at a time; who waits for something else passes its turn on
    windows       tiles of the features that definitions declares
    read_lately   values that were read a moment ago, as long as they hold
    feature_store both systems' features, merged, with where each value comes from
    publisher     the public feature keys of who is in the outbox, after the commit
    lookups       receipts, dead letters, predictions
    serving       the snapshot that the dashboard reads; standing says why all is not well
    jobs          what APScheduler runs, and how often
    runtime       builds, starts and stops all of it; supervisor does so for the processes
"""
