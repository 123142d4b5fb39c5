"""A teacher, an upsampler, a fitted network and a benchmark that radio-distill finds by name."""
