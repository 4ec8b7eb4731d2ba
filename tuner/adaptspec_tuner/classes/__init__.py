"""Learns to tell a workload's classes."""
