"""Runs the stages of a recipe on a Slurm cluster, through submitit."""

PROJECT = "radio-distill"
