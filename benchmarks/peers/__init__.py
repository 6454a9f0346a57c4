"""What Nexus is measured beside. Each peer does a smaller job, which its label says."""
