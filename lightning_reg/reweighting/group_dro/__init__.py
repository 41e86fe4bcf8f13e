"""Group DRO: training against the worst of several groups, and the metrics that tell how the worst one fares."""
