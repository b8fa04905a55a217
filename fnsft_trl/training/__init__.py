"""Training: FNSFTTrainer, what one run selects, trains and masks, and the callbacks that watch it."""
