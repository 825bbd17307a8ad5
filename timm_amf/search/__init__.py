"""What suits a data set: measures of how well pretrained weights fit it, and advice from them."""
