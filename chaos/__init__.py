"""The chaos suite: the whole system under load while its processes are killed and stopped, then an audit over HTTP.

python -m chaos [--kills N] [--events N] [--seed N] [--minutes M]

clients   post events with known ids, retry every lost answer, send some twice and some late
faults    which process is killed or stopped, when, and for how long: decided by the seed
system    the processes, started by the real supervisor on free ports and a data folder of their own
audit     conservation at every look, and at the end the recount of all that the system says it holds
report    the figures of a run
"""
