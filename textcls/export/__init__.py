"""From a checkpoint to a folder to deploy."""
