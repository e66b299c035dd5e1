"""Labelled images: the splits of a data set, and its images as training and evaluation read them."""
