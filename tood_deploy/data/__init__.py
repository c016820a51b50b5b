"""Images, annotations and results in files: every reader and writer of them.

Imports nothing heavy.
"""

# To calibrate on: a warning is given of fewer than the first, of more than the second so many are
# taken.
MIN_CALIBRATION_IMAGES, MAX_CALIBRATION_IMAGES = 64, 128
