"""Attention without the matrix of scores (FlashAttention: Dao et al. 2022, arXiv:2205.14135)."""
