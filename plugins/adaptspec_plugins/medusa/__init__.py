"""Trees drafted by Medusa heads."""
