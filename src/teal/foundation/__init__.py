"""What every floor stands on: errors with a cure, artifacts on disk, and who a model or text is."""
