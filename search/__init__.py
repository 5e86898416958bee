"""Which policy comes next, where it runs and for how long."""
