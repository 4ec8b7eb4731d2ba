"""The search for each class's best parameters."""
