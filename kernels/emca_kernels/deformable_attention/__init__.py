"""Multi-scale deformable attention, the core of Mask2Former's pixel decoder."""
