"""What was measured turned into a choice: pure, for all classes of a tune together."""
