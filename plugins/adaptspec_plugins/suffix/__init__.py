"""What most often followed the same ending."""
