"""Records of boots: what each phase took, kept, compared and drawn."""
