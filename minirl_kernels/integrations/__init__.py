"""Other projects' models and trainers, given our calls; each file imports what it is named after."""
