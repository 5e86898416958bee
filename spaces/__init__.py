"""What can be chosen: policies, the anatomy of a model and the space of policies that it allows."""
