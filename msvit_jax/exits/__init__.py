"""Early exits of cascades: the thresholds that choose one, and accuracy over compute."""
