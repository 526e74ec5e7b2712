"""Stand-ins that tests run against: each has tests of its own and refuses what it does not know."""
