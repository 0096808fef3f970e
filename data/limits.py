"""Largest numbers that a user may ask for or bring."""

# scikit-learn takes seeds of 32 bits.
MAX_SEED = 2**32 - 1
# Pixels of a side that images may be brought to.
MAX_SIDE = 16_384
MAX_DRAWN = 10**8
# Squared distances over many features must not overflow float32, which ends at 3e38.
MAX_MAGNITUDE = 1e15
