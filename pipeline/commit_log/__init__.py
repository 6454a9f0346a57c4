"""The log's parts: frames and addresses, who may commit, how far each stream is, what lies dead, what is let go of."""
