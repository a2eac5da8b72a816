"""Record the fused pass once, replay it as one flat program while all that it depended on is as it was."""
