"""Who is warm, parked or at zero, and when: policies, and who gets what is scarce."""
