"""Training: closed form, alignment stages, stopping, end-to-end fine-tuning, baselines."""
