"""What a training step costs on a slice of TPUs, from compiling it where there is none."""
