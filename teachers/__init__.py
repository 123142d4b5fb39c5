PROJECT = "radio-distill"
