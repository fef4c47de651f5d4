"""What a training starts from: settings that follow from the rows, and the head in closed form."""
