"""Publishing: the public feature keys of users, who is due, how healthy the values are, and which sides drifted apart."""
