"""The settings of a run: the fields that become flags, their ranges, and what is made from them."""
