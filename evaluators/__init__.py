"""What a policy is worth: the task, its anatomy, applying and fine-tuning a policy, measuring it."""
