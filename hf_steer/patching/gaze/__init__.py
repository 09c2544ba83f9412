"""Turn the gaze: from what is said or seen to the bias of every steered layer, pass by pass."""
