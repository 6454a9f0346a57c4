"""Nexus's pipeline: the data's way.

HTTP -> ingest -> log -> five streams -> feature store, models -> serving -> HTTP, dashboard

    ingest         judges each event of a posted body and brings the good ones to the log, in one atomic step
    log            frames of events in segments; the truth, and the write-ahead log of everything else
    commit_log/    its parts: frames, who reads on at its end (follower), effects and position in one step (checkpoints), fenced by
                   the lease; dead letters, receipts (lookups), retention
    streams/       features, storage, aggregates, inference: features first, each with its checkpoints (runner, group, worker, straggler);
                   bridge: on its own, to the Python service
    bridge/        its parts: windows and lanes (delivery, sender, suspects), gate and circuit, throttle; attempts, outages, health,
                   and the wire (transport, replies) that partner speaks
    catalogue      declares the features, by the rules of definitions; windows keeps their tiles
    features/      how events are counted in tiles (extraction, families) and values read from them, now (reading) or as of then (offline)
    feature_store  both systems' features, merged, with where each value comes from
    publishing/    the public feature keys of who is in the outbox, after the commit
    models/        fraud and demand, pure; learning/ has their history, the versions in force, and who takes over
    serving        the snapshot that the dashboard reads
    routes, web/   the HTTP side: bodies, routes, and their description; wire/ has the types
    concurrency/   what is done together (joint), in turns, and first (precedence)
    operations/    settings at run time, the log file, the store's room, canaries, and why all is not well (standing)
    jobs           what APScheduler runs, and how often
    runtime        builds, starts and stops all of it; supervisor does so for the processes
    tools/         demo traffic, replays, drills, training sets: each by `python -m`
"""
