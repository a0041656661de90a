"""Adapters of ww_train to training loops; installed as `ww_train.callbacks`."""
