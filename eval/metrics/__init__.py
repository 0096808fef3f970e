"""The scores themselves, as mathematics over arrays: nothing here reads files or knows of bins, sets or machines."""
