"""Few bits for a trained model: what ``methods.rate_distortion`` does once it knows what errors cost.

Click models: ``allocation`` finds the bits of every row and direction, ``coded`` is the table that they make, ``head``
codes the matrices beside it, ``touchup`` adjusts both to the dense model. Rankers: ``gainshape`` plans and codes items
and users, by ``beam`` searches, ``trellised`` is their table, ``listladder`` meets budgets, ``distilledlists`` is their
touch-up.
"""
