"""Images, annotations and results in files: every reader and writer of them. Imports nothing heavy."""

# To calibrate on: of fewer a warning is given, of more so many are taken.
FEWEST_CALIBRATION_IMAGES, MOST_CALIBRATION_IMAGES = 64, 128
