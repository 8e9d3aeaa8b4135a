"""How many regions a photo has, and when two are the same: numbers that training, export and serving share."""

LEAST, MOST = 10, 36  # regions of a photo, the large cells not counted
CONFIDENCE = 0.1  # from which a region counts, where there are more than the least
NMS_IOU = 0.65  # overlap from which the less sure of two goes
BACKGROUND_SIDE = 3  # large cells a side, a divisor of the grid's nine
SAMPLES = 3  # points a side that RoIAlign reads of a region
