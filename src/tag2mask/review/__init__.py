"""A page on which a person walks through the masks of a run and decides on each."""
