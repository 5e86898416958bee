"""How long a policy takes on the target: calibration, prediction with an interval, measurement."""
