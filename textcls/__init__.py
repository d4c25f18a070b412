"""What the commands share: the library of the suite. docs/development.md has a map of it."""
