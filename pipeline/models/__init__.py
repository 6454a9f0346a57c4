"""The models, pure: numbers in, numbers out. Streams feed them and keep their state."""
