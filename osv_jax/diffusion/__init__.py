"""The mathematics of the papers: functions of arrays and of a denoiser, without parameters."""
