// The comparison has one figure and nothing to choose.

startFigures();
