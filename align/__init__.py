"""Stage two: the head that is trained over cached features."""
